"""Add the pages of edgeopt to the MLflow server: the `mlflow.app` plugin `edgeopt`.

    mlflow server --app-name edgeopt --backend-store-uri sqlite:///mlflow.db

`edgeopt ui` runs this command.
"""

from __future__ import annotations

from typing import Any

from edgeopt.pages.app import PREFIX, create_pages


def create_app() -> Any:
    """Return the FastAPI application of `mlflow server`, with the pages mounted before its catch-all route."""
    from mlflow.server.fastapi_app import app
    from mlflow.server.handlers import _add_static_prefix
    from starlette.routing import Mount

    app.router.routes.insert(0, Mount(_add_static_prefix(PREFIX), app=create_pages()))
    return app
