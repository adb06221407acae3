"""Other libraries' interfaces over onepass: change one import, keep the calls. Each module names its original."""
