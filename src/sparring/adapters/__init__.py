"""Other people's files and libraries."""
