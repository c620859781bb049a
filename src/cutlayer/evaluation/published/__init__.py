"""The tasks of published tables: their files, their templates, their official scores."""
