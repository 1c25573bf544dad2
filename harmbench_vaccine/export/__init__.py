"""Models of stored runs outside the store: load, export to ordinary folders, edit adapters of any origin."""
