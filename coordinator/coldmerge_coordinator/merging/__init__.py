"""The merge of a round at the coordinator: from contributions and masters in the store to blobs."""
