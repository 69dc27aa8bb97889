"""What both papers print: recipes, tables, figures and theory, and the runs that make them."""
