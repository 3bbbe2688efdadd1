"""Named data sets, one file each. What needs no download comes from scikit-learn's bundled files or is computed."""
