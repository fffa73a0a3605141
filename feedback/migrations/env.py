"""Alembic runs this to bring the store's tables up to date, on the connection that the store hands over."""

from alembic import context

from feedback.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
