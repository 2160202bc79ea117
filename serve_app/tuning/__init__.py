"""Loads, measured and simulated: what replicas give a load, and what it takes."""
