"""The shipped recipes: YAML files, each with its measured result in its card."""
