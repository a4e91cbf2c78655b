"""Measurements of speed that check the result first: what ``ternarize bench`` runs."""
