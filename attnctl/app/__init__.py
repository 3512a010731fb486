"""What command line, batches and demos share: recipes, loading, drawing, controls written as text."""
