"""Write measured numbers as reports: text, tables, charts and HTML pages."""
