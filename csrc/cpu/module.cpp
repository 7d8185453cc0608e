// The Python module nemo_engine._cpu: kernels called with the addresses of tensors, whose shapes nemo_engine/ops/cpu/compiled.py has checked.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <omp.h>

#include <initializer_list>

#include "kernels.h"

namespace {

using namespace nemo;

// Takes a call's arguments one after the other; what is missing or no number is found by `is_complete`.
class Arguments {
 public:
  Arguments(PyObject* const* args, Py_ssize_t count) : next_(args), end_(args + count) {}

  int64_t integer() {
    if (next_ == end_) return is_short_ = true, 0;
    return PyLong_AsLongLong(*next_++);
  }
  float number() {
    if (next_ == end_) return is_short_ = true, 0;
    return static_cast<float>(PyFloat_AsDouble(*next_++));
  }
  template <class T>
  T* address() {
    return reinterpret_cast<T*>(static_cast<intptr_t>(integer()));
  }
  bool is_complete() {
    if (PyErr_Occurred()) return false;
    if (!is_short_ && next_ == end_) return true;
    PyErr_SetString(PyExc_TypeError, "wrong number of arguments");
    return false;
  }

 private:
  PyObject *const *next_, *const *end_;
  bool is_short_ = false;
};

template <class T>
Norm<T> read(Arguments& from, Norm<T>*) {
  Norm<T> a;
  a.x = from.address<const T>();
  a.residual = from.address<const T>();
  a.weight = from.address<const T>();
  a.y = from.address<T>();
  a.sum = from.address<T>();
  a.rows = from.integer();
  a.width = from.integer();
  a.eps = from.number();
  return a;
}

template <class T>
Activation<T> read(Arguments& from, Activation<T>*) {
  Activation<T> a;
  a.gate_up = from.address<const T>();
  a.y = from.address<T>();
  a.rows = from.integer();
  a.width = from.integer();
  return a;
}

template <class T>
Rope<T> read(Arguments& from, Rope<T>*) {
  Rope<T> a;
  a.q = from.address<const T>();
  a.k = from.address<const T>();
  a.v = from.address<const T>();
  a.rotated = from.address<T>();
  a.table = from.address<const float>();
  a.positions = from.address<const int64_t>();
  a.slots = from.address<const int64_t>();
  a.k_cache = from.address<T>();
  a.v_cache = from.address<T>();
  for (int64_t* field : {&a.tokens, &a.q_heads, &a.kv_heads, &a.dim, &a.page_size, &a.q_stride, &a.k_stride, &a.v_stride})
    *field = from.integer();
  return a;
}

template <class T>
Attention<T> read(Arguments& from, Attention<T>*) {
  Attention<T> a;
  a.q = from.address<const T>();
  a.out = from.address<T>();
  a.k_cache = from.address<const T>();
  a.v_cache = from.address<const T>();
  a.page_table = from.address<const int64_t>();
  a.slot_ids = from.address<const int64_t>();
  a.seq_lens = from.address<const int64_t>();
  for (int64_t* field : {&a.rows, &a.heads, &a.kv_heads, &a.dim, &a.page_size, &a.table_stride}) *field = from.integer();
  a.scale = from.number();
  return a;
}

// The first argument says whether the tensors are bf16 (else fp32); the others are the fields of Args, in their order.
template <template <class> class Args, void (*narrow)(const Args<Bf16>&), void (*wide)(const Args<float>&)>
PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Arguments from(args, count);
  const bool is_bf16 = from.integer();
  if (is_bf16) {
    auto a = read(from, static_cast<Args<Bf16>*>(nullptr));
    if (!from.is_complete()) return nullptr;
    Py_BEGIN_ALLOW_THREADS;
    narrow(a);
    Py_END_ALLOW_THREADS;
  } else {
    auto a = read(from, static_cast<Args<float>*>(nullptr));
    if (!from.is_complete()) return nullptr;
    Py_BEGIN_ALLOW_THREADS;
    wide(a);
    Py_END_ALLOW_THREADS;
  }
  Py_RETURN_NONE;
}

// How many threads the calling thread's loops take from now on, those of torch and oneDNN too. Other threads keep theirs.
PyObject* set_num_threads(PyObject*, PyObject* count) {
  const long wanted = PyLong_AsLong(count);
  if (PyErr_Occurred()) return nullptr;
  if (wanted < 1 || wanted > 4096) return PyErr_Format(PyExc_ValueError, "threads must be from 1 to 4096, got %ld", wanted);
  omp_set_num_threads(static_cast<int>(wanted));
  Py_RETURN_NONE;
}

#define FUNCTION(name, Args) \
  {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call<Args, name<Bf16>, name<float>>)), METH_FASTCALL, nullptr}

PyMethodDef methods[] = {
    FUNCTION(rms_norm, Norm),
    FUNCTION(silu_mul, Activation),
    FUNCTION(rope_and_append_kv, Rope),
    FUNCTION(query_attention, Attention),
    {"set_num_threads", set_num_threads, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&definition); }
