"""What a change of mixtures means: `smol diff`, and the workflow that posts it on pull requests."""
