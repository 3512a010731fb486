"""The graphical demos. They may use every other room, and no other room knows of them."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it while it is imported
