"""The checks of filter_plugins/verdicts.py. Only the controller uses them, so they are not in module_utils."""
