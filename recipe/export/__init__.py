"""Out of the trainer, into use: adapters as a PEFT folder, checked by the plain libraries; evaluation; chat."""
