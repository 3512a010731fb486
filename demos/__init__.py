"""The graphical demos. They may use every other room, and no other room knows of them."""
