"""The `tritonnorm` command."""
