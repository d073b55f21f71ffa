"""What a model keeps for backward, and what converting it would leave."""
