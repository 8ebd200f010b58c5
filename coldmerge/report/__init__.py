"""Pictures, the demo's page, and the model card of a release."""
