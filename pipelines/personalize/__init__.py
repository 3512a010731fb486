"""The parts of `attnctl.pipelines.Personalizer`: settings, words, views of the picture, the loop, and files."""
