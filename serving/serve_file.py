"""A configuration file of `serve run`, as Ray Serve reads it."""

from typing import Any, NamedTuple

from ray.serve.schema import ServeDeploySchema


class ServeFile(NamedTuple):
    """Where it listens, and its applications: names and arguments."""

    host: str
    port: int
    applications: list[tuple[str, dict[str, Any]]]

    @classmethod
    def of(cls, content: object) -> "ServeFile":
        """Return what a file's content says.

        Raises:
            pydantic.ValidationError: Serve would not take it.
        """
        schema = ServeDeploySchema.model_validate(content)
        http = schema.http_options
        return cls(http.host, http.port, [(one.name, one.args) for one in schema.applications])
