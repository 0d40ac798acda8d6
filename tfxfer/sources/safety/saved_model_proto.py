"""The part of TensorFlow's SavedModel messages that the gate reads, made here so that TensorFlow is not imported.

Message and field numbers as in tensorflow/core/protobuf (saved_model.proto, meta_graph.proto,
saved_object_graph.proto) and tensorflow/core/framework (graph.proto, function.proto, node_def.proto,
attr_value.proto). Maps are read as the lists of entries that they are, so that a key that comes twice is seen twice.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# Field: (number, type), "*" for repeated; a type that is no scalar is a message of this table.
MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "SavedModel": {"meta_graphs": (2, "*MetaGraph")},
    "MetaGraph": {
        "graph": (2, "Graph"),
        "saver": (3, "Saver"),
        "collections": (4, "*CollectionEntry"),
        "signatures": (5, "*SignatureEntry"),
        "assets": (6, "*Asset"),
        "objects": (7, "ObjectGraph"),
    },
    "Graph": {"nodes": (1, "*Node"), "library": (2, "Library")},
    "Library": {"functions": (1, "*Function")},
    "Function": {"signature": (1, "OpDef"), "nodes": (3, "*Node"), "attributes": (5, "*AttrEntry")},
    "OpDef": {"name": (1, "string"), "arguments": (2, "*Argument")},
    "Argument": {"name": (1, "string")},
    "Node": {"name": (1, "string"), "op": (2, "string"), "inputs": (3, "*string"), "attributes": (5, "*AttrEntry")},
    "AttrEntry": {"key": (1, "string"), "value": (2, "Attr")},
    "Attr": {"items": (1, "AttrList"), "text": (2, "bytes"), "tensor": (8, "Tensor"), "function": (10, "Callee")},
    "AttrList": {"tensors": (8, "*Tensor"), "functions": (9, "*Callee")},
    "Callee": {"name": (1, "string"), "attributes": (2, "*AttrEntry")},
    "Tensor": {"dtype": (1, "int32"), "shape": (2, "Shape"), "texts": (8, "*bytes")},
    "Shape": {"sides": (2, "*Side"), "unknown_rank": (3, "bool")},
    "Side": {"size": (1, "int64")},
    "Saver": {"filename": (1, "string"), "save": (2, "string"), "restore": (3, "string")},
    "CollectionEntry": {"key": (1, "string"), "value": (2, "Collection")},
    "Collection": {"names": (1, "NameList"), "anything": (5, "AnyList")},
    "NameList": {"values": (1, "*string")},
    "AnyList": {"values": (1, "*Any")},
    "Any": {"type_url": (1, "string"), "value": (2, "bytes")},
    "SignatureEntry": {"key": (1, "string"), "value": (2, "Signature")},
    "Signature": {"inputs": (1, "*TensorEntry"), "outputs": (2, "*TensorEntry")},
    "TensorEntry": {"key": (1, "string"), "value": (2, "TensorInfo")},
    "TensorInfo": {"name": (1, "string"), "sparse": (4, "SparseInfo"), "composite": (5, "CompositeInfo")},
    "SparseInfo": {"values": (1, "string"), "indices": (2, "string"), "dense_shape": (3, "string")},
    "CompositeInfo": {"parts": (2, "*TensorInfo")},
    "Asset": {"tensor": (1, "TensorInfo"), "filename": (2, "string")},
    "ObjectGraph": {"nodes": (1, "*Object"), "functions": (2, "*ConcreteEntry")},
    "Object": {
        "user_object": (4, "Nothing"),
        "asset": (5, "AssetObject"),
        "function": (6, "FunctionObject"),
        "variable": (7, "Variable"),
        "bare_function": (8, "BareFunction"),
        "constant": (9, "Nothing"),
        "resource": (10, "Nothing"),
        "captured_tensor": (12, "Nothing"),
        "registered_name": (13, "string"),
    },
    "Nothing": {},
    "AssetObject": {"index": (1, "int32")},
    "FunctionObject": {"names": (1, "*string")},
    "BareFunction": {"name": (1, "string")},
    "Variable": {"dtype": (1, "int32"), "shape": (2, "Shape")},
    "ConcreteEntry": {"key": (1, "string"), "value": (2, "Concrete")},
    "Concrete": {"bound_inputs": (2, "*int32")},
}
_PACKAGE = "tfxfer_safety"
_TYPES = {
    "string": descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
    "bytes": descriptor_pb2.FieldDescriptorProto.TYPE_BYTES,
    "int32": descriptor_pb2.FieldDescriptorProto.TYPE_INT32,
    "int64": descriptor_pb2.FieldDescriptorProto.TYPE_INT64,
    "bool": descriptor_pb2.FieldDescriptorProto.TYPE_BOOL,
}


def parse(kind: str, content: bytes) -> Any:
    """Parse `content` as the message `kind` of the table above.

    Raises:
        google.protobuf.message.DecodeError: Where it is damaged, nested too deep or holds text that is no UTF-8.

    Example:
        >>> parse("Asset", bytes([18, 1, 97])).filename
        'a'
    """
    message = _CLASSES[kind]()
    message.ParseFromString(content)
    return message


def _classes() -> dict[str, Any]:
    """A message class for each row, in a pool of their own beside TensorFlow's."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{_PACKAGE}.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            label = (
                descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
                if kind.startswith("*")
                else descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL
            )
            kind = kind.removeprefix("*")
            entry = message.field.add(name=field, number=number, label=label)
            if kind in _TYPES:
                entry.type = _TYPES[kind]
            else:
                entry.type, entry.type_name = (
                    descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE,
                    f".{_PACKAGE}.{kind}",
                )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in MESSAGES
    }


_CLASSES = _classes()
