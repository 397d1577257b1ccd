"""The comparison of deployments under equal load: configuration, runs, figures, report."""
