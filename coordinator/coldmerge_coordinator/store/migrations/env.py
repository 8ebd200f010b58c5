"""Runs migrations on the connection that `store.database.migrate` opened."""

from __future__ import annotations

from alembic import context

from coldmerge_coordinator.store.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
context.run_migrations()
