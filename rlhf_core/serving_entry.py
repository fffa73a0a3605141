"""What MLflow runs when it loads a registered policy ("models from code")."""

from mlflow.models import set_model

from rlhf_core.serving import ChatPolicy

set_model(ChatPolicy())
