"""What is distilled and how: pure functions on tensors."""
