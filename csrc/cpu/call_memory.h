// What call_memory.cpp gives to Python; bindings.cpp puts it into the module.
#pragma once
#include <Python.h>

namespace slimkernels {

// 0, or -1 with a Python exception.
int add_call_memory(PyObject* module);

}  // namespace slimkernels
