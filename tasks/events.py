"""The events that flows send to Prefect's server, for automations to act on."""

from __future__ import annotations

# A collection of feedback ended. Resource: `prefect.resource.id: rlhf.feedback.PROJECT`. Payload: `project`
# (the id in the annotation service), `votes` (that count), `reason` ("votes" or "deadline").
FEEDBACK_READY = "rlhf.feedback.ready"
