// What has been found out about calls, by what they look like: a dict that costs less.
//
// Computes: a key of a call's tensors and options: device, dtype and shape of a tensor, type and
// value of an option, so that 1, 1.0 and True differ, inside a tuple too. Nothing is kept of what
// has more to it: a tensor of another class or without plain memory, an option of another type.
// Traffic: a model's calls find cold caches, where each thing that Python looks up costs about a
// microsecond, a dict of bytes five. So this is CPython's C interface, without pybind11; torch is
// asked once a tensor, through the table of functions that DLPack defines (no header of torch is
// needed); and no object is made of a key.
//
// Compiled for the baseline instruction set, like bindings.cpp.
#include "call_memory.h"

#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace slimkernels {
namespace {

// DLPack 1's structs, as far as they are read here.
struct DlTensor {
  void* data;
  int32_t device_type, device_index;
  int32_t dims;
  uint8_t dtype[4];
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;
};

struct DlFunctions {
  uint32_t major, minor;
  const DlFunctions* older;
  void* of_owned_tensors[3];
  int (*look_at)(void* tensor, DlTensor* out);
};

struct Torch {
  PyTypeObject *tensor, *parameter, *size;
  PyObject* is_transformed;
  int (*look_at)(void* tensor, DlTensor* out);
  // Whether look_at has failed once. That takes it a millisecond, so where meta tensors or
  // transforms are about, they are looked for first; others need not pay for it.
  bool has_refused;
} torch;

class Signature {
 public:
  void byte(uint8_t value) { bytes(&value, 1); }

  void bytes(const void* values, size_t n) {
    if (n > sizeof(bytes_) - n_) {
      is_full_ = true;
      return;
    }
    std::memcpy(bytes_ + n_, values, n);
    n_ += n;
  }

  // Seven bits a byte: a key is read out of cold caches, too.
  void number(uint64_t value) {
    for (; value >= 128; value >>= 7) byte(128 | (value & 127));
    byte(value);
  }

  bool is_full() const { return is_full_; }
  const char* data() const { return bytes_; }
  size_t size() const { return n_; }

 private:
  char bytes_[512];
  size_t n_ = 0;
  bool is_full_ = false;
};

bool is_true(PyObject* owned) {
  if (owned == nullptr) PyErr_Clear();
  const bool is = owned == Py_True;
  Py_XDECREF(owned);
  return is;
}

// Whether `tensor` is on the meta device or one of those that DLPack does not know.
bool is_elsewhere(PyObject* tensor) {
  return !is_true(PyObject_GetAttrString(tensor, "is_cpu")) &&
         !is_true(PyObject_GetAttrString(tensor, "is_cuda"));
}

bool add_tensor(PyObject* tensor, Signature& to) {
  if (tensor == Py_None) {
    to.byte('N');
    return true;
  }
  if (Py_TYPE(tensor) != torch.tensor && Py_TYPE(tensor) != torch.parameter) return false;
  if (torch.has_refused && is_elsewhere(tensor)) return false;
  DlTensor seen;
  if (torch.look_at(tensor, &seen) != 0) {
    PyErr_Clear();
    torch.has_refused = true;
    return false;
  }
  to.byte('T');
  to.number(seen.device_type);
  to.number(seen.device_index);
  to.bytes(seen.dtype, sizeof(seen.dtype));
  to.number(seen.dims);
  for (int32_t i = 0; i < seen.dims; ++i) to.number(seen.shape[i]);
  return true;
}

bool add_option(PyObject* option, Signature& to);

bool add_options(uint8_t kind, PyObject* sequence, Signature& to) {
  const Py_ssize_t n = PySequence_Fast_GET_SIZE(sequence);
  to.byte(kind);
  to.number(n);
  for (Py_ssize_t i = 0; i < n && !to.is_full(); ++i)  // a list may be its own element
    if (!add_option(PySequence_Fast_GET_ITEM(sequence, i), to)) return false;
  return true;
}

bool add_text(PyObject* option, Signature& to) {
  Py_ssize_t n;
  const char* text = PyUnicode_AsUTF8AndSize(option, &n);
  if (text == nullptr) {  // half a surrogate pair
    PyErr_Clear();
    return false;
  }
  to.byte('S');
  to.number(n);
  to.bytes(text, n);
  return true;
}

bool add_integer(PyObject* option, Signature& to) {
  int overflow;
  const int64_t value = PyLong_AsLongLongAndOverflow(option, &overflow);
  to.byte('I');
  to.number(static_cast<uint64_t>(value) << 1 ^ static_cast<uint64_t>(value >> 63));
  return overflow == 0;
}

bool add_option(PyObject* option, Signature& to) {
  if (option == Py_None || option == Py_True || option == Py_False) {
    to.byte(option == Py_None ? 'N' : option == Py_True ? '1' : '0');
    return true;
  }
  PyTypeObject* type = Py_TYPE(option);
  if (type == &PyLong_Type) return add_integer(option, to);
  if (type == &PyFloat_Type) {
    const double value = PyFloat_AS_DOUBLE(option);
    to.byte('F');
    to.bytes(&value, sizeof(value));
    return true;
  }
  if (type == &PyTuple_Type || type == torch.size) return add_options('(', option, to);
  if (type == &PyList_Type) return add_options('[', option, to);
  return type == &PyUnicode_Type && add_text(option, to);
}

// `call` is (tensors, options); whether all of it could be added.
bool add_call(PyObject* call, Signature& to) {
  if (torch.has_refused && is_true(PyObject_CallNoArgs(torch.is_transformed))) return false;
  PyObject* tensors = PyTuple_GET_ITEM(call, 0);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors); ++i)
    if (!add_tensor(PyTuple_GET_ITEM(tensors, i), to)) return false;
  return add_options('(', PyTuple_GET_ITEM(call, 1), to) && !to.is_full();
}

bool check_call(PyObject* call) {
  if (PyTuple_Check(call) && PyTuple_GET_SIZE(call) == 2 &&
      PyTuple_Check(PyTuple_GET_ITEM(call, 0)) && PyTuple_Check(PyTuple_GET_ITEM(call, 1)))
    return true;
  PyErr_SetString(PyExc_TypeError, "CallMemory: a call is a tuple of two tuples");
  return false;
}

uint64_t hash_of(const Signature& signature) {
  uint64_t hash = signature.size();
  for (size_t i = 0; i < signature.size(); i += 8) {
    const size_t rest = signature.size() - i;
    uint64_t part = 0;
    std::memcpy(&part, signature.data() + i, rest < 8 ? rest : 8);
    hash = (hash ^ part) * 0x9fb21c651e98df25u;
    hash ^= hash >> 32;
  }
  return hash;
}

struct Entry {
  uint64_t hash;
  size_t size;
  char* key;  // null where there is none
  PyObject* value;
};

// Open addressing in `capacity` entries, a power of two and at least twice as many as are kept.
struct CallMemory {
  PyObject_HEAD;
  Entry* entries;
  size_t capacity, kept, most;
};

CallMemory* memory_of(PyObject* self) { return reinterpret_cast<CallMemory*>(self); }

// Where the call is, or where it would go.
Entry* find(const CallMemory* memory, const Signature& signature, uint64_t hash) {
  for (size_t i = hash;; ++i) {
    Entry* entry = memory->entries + (i & (memory->capacity - 1));
    if (entry->key == nullptr) return entry;
    if (entry->hash == hash && entry->size == signature.size() &&
        std::memcmp(entry->key, signature.data(), entry->size) == 0)
      return entry;
  }
}

void forget(Entry* entries, size_t capacity) {
  for (size_t i = 0; i < capacity; ++i) {
    PyMem_Free(entries[i].key);
    Py_XDECREF(entries[i].value);
  }
  PyMem_Free(entries);
}

// Whether there is memory for another table. What values do as they go finds the new one.
bool clear(CallMemory* memory) {
  auto* entries = static_cast<Entry*>(PyMem_Calloc(memory->capacity, sizeof(Entry)));
  if (entries == nullptr) return false;
  Entry* old = memory->entries;
  memory->entries = entries;
  memory->kept = 0;
  if (old != nullptr) forget(old, memory->capacity);
  return true;
}

PyObject* memory_get(PyObject* self, PyObject* call) {
  if (!check_call(call)) return nullptr;
  Signature signature;
  if (!add_call(call, signature)) Py_RETURN_NONE;
  PyObject* value = find(memory_of(self), signature, hash_of(signature))->value;
  if (value == nullptr) Py_RETURN_NONE;
  Py_INCREF(value);
  return value;
}

PyObject* memory_put(PyObject* self, PyObject* args) {
  PyObject *call, *value;
  if (!PyArg_ParseTuple(args, "OO", &call, &value) || !check_call(call)) return nullptr;
  CallMemory* memory = memory_of(self);
  Signature signature;
  if (!add_call(call, signature)) Py_RETURN_NONE;
  while (memory->kept == memory->most)
    if (!clear(memory)) return PyErr_NoMemory();
  const uint64_t hash = hash_of(signature);
  Entry* entry = find(memory, signature, hash);
  if (entry->key == nullptr) {
    entry->key = static_cast<char*>(PyMem_Malloc(signature.size()));
    if (entry->key == nullptr) return PyErr_NoMemory();
    std::memcpy(entry->key, signature.data(), signature.size());
    entry->size = signature.size();
    entry->hash = hash;
    ++memory->kept;
  }
  PyObject* old = entry->value;
  Py_INCREF(value);
  entry->value = value;
  Py_XDECREF(old);
  Py_RETURN_NONE;
}

PyObject* memory_clear(PyObject* self, PyObject*) {
  if (!clear(memory_of(self))) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

Py_ssize_t memory_length(PyObject* self) { return memory_of(self)->kept; }

PyObject* memory_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  int most;
  char name[] = "most";
  char* names[] = {name, nullptr};
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "i", names, &most)) return nullptr;
  if (most < 1 || most > 1 << 20) {
    PyErr_SetString(PyExc_ValueError, "CallMemory: from 1 to 2^20 calls can be kept");
    return nullptr;
  }
  PyObject* self = type->tp_alloc(type, 0);
  if (self == nullptr) return nullptr;
  CallMemory* memory = memory_of(self);
  memory->most = most;
  for (memory->capacity = 2; memory->capacity < 2 * memory->most;) memory->capacity *= 2;
  if (clear(memory)) return self;
  Py_DECREF(self);
  return PyErr_NoMemory();
}

void memory_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  CallMemory* memory = memory_of(self);
  if (memory->entries != nullptr) forget(memory->entries, memory->capacity);
  type->tp_free(self);
  Py_DECREF(type);
}

PyMethodDef memory_methods[] = {
    {"get", memory_get, METH_O, "get(call) -> what was put for one like it, or None"},
    {"put", memory_put, METH_VARARGS, "put(call, value): keep it, if there is a key for the call"},
    {"clear", memory_clear, METH_NOARGS, "clear(): forget all calls"},
    {nullptr, nullptr, 0, nullptr},
};

char kDocumentation[] =
    "CallMemory(most): values by calls, (tensors, options). It is emptied where `most` are kept.";

PyType_Slot memory_slots[] = {
    {Py_tp_doc, kDocumentation},
    {Py_tp_new, reinterpret_cast<void*>(memory_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(memory_dealloc)},
    {Py_tp_methods, memory_methods},
    {Py_sq_length, reinterpret_cast<void*>(memory_length)},
    {0, nullptr},
};

PyType_Spec memory_spec = {"slimkernels._cpu.CallMemory", sizeof(CallMemory), 0, Py_TPFLAGS_DEFAULT,
                           memory_slots};

PyObject* recognize_torch(PyObject*, PyObject* args) {
  PyObject *tensor, *parameter, *size, *is_transformed;
  if (!PyArg_ParseTuple(args, "O!O!O!O", &PyType_Type, &tensor, &PyType_Type, &parameter,
                        &PyType_Type, &size, &is_transformed))
    return nullptr;
  constexpr char kName[] = "dlpack_exchange_api";
  PyObject* capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
  if (capsule == nullptr) PyErr_Clear();
  const DlFunctions* functions = nullptr;
  if (capsule != nullptr && PyCapsule_IsValid(capsule, kName))
    functions = static_cast<const DlFunctions*>(PyCapsule_GetPointer(capsule, kName));
  Py_XDECREF(capsule);
  while (functions != nullptr && functions->major != 1) functions = functions->older;
  if (functions == nullptr || functions->look_at == nullptr) Py_RETURN_FALSE;
  for (PyObject* kept : {tensor, parameter, size, is_transformed}) Py_INCREF(kept);
  torch = {reinterpret_cast<PyTypeObject*>(tensor),
           reinterpret_cast<PyTypeObject*>(parameter),
           reinterpret_cast<PyTypeObject*>(size),
           is_transformed,
           functions->look_at,
           false};
  Py_RETURN_TRUE;
}

PyMethodDef module_methods[] = {
    {"recognize_torch", recognize_torch, METH_VARARGS,
     "recognize_torch(Tensor, Parameter, Size, is_transformed) -> whether calls can be kept"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_call_memory(PyObject* module) {
  PyObject* type = PyType_FromSpec(&memory_spec);
  if (type == nullptr) return -1;
  if (PyModule_AddObject(module, "CallMemory", type) != 0) {
    Py_DECREF(type);
    return -1;
  }
  return PyModule_AddFunctions(module, module_methods);
}

}  // namespace slimkernels
