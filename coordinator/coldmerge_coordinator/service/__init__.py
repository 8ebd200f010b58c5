"""The gRPC services: handlers that translate, and leave the deciding to others."""
