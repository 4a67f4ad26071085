"""What a build file names -> a Model and Data."""
