"""The class by whose name Ray Serve creates request routers."""

from adakv_serve.serving.ingress.occupancy_router import OccupancyRouter


class ServedRouter(OccupancyRouter):
    """`OccupancyRouter` in a module of its own, of which Serve sends a copy to each process.

    A copy has its own class attributes. Those of `OccupancyRouter`, which ingress and replica set,
    are not copied, because another module has them.
    """
