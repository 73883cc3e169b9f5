"""What a user asks for: recipes and options. No model."""
