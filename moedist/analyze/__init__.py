"""What a trained model's routers have learned: which tokens each expert takes, with which others, and since when."""
