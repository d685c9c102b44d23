"""A results file for people: tables for the terminal and to paste, pictures, and a page of HTML."""
