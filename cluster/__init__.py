"""What runs where: settings, the Serve application, the `learnonce` command; and the leaves every room may use."""
