"""Built-in models: recipes and weights."""
