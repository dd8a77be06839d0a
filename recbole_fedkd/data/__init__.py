"""Data: RecBole's dataset with labels in stars, histories, and the partition of users into clients."""
