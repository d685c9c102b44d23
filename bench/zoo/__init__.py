"""fold on the models of other libraries: how many batch norms go, how exact, how long it takes."""
