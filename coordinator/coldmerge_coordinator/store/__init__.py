"""The coordinator's truth: tables, migrations, blobs."""
