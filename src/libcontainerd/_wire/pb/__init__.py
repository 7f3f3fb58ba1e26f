"""containerd's API as classes, generated from protos/ by tools/gen_protos.py. Never edited.

services.<name>_pb2   one module per gRPC service, with its requests and answers: containers, content, events, images,
                      introspection, leases, namespaces, sandbox (the store), snapshots, tasks, version
types.<name>_pb2      what they share: descriptor, event (Envelope), metrics, mount, platform, sandbox, task
events.<name>_pb2     the messages inside an envelope: container, content, image, namespace, sandbox, snapshot, task
runc.options_pb2      containerd.runc.v1; runc.linux_pb2 is containerd.linux.runc, for the old v1 runtime
cgroups.v1_pb2        io.containerd.cgroups.v1, and v2_pb2 for v2
wellknown_pb2         Any, Empty, FieldMask, Timestamp: the only ones that fit into messages of this package
status_pb2            google.rpc.Status, likewise

A service module has ``<Service>Stub(channel)``, with one typed multi-callable per method, and ``<Service>Servicer``, whose
subclasses define the methods they serve and go to ``server.add_generic_rpc_handlers((servicer.generic_handler(),))``.
Modules load what they build on and no more. Everything is in a descriptor pool of our own; see ``_wire/_pool.py``.
"""
