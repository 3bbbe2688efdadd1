"""What every stage may import, and nothing of the stages: errors, messages, the registry, the recipe, the run folder."""
