// The Python module nemo_engine._cpu: kernels called with the addresses of tensors, whose shapes nemo_engine/ops/cpu/compiled.py has checked.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <omp.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <type_traits>

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
  for (int64_t* field : {&a.rows, &a.q_heads, &a.kv_heads, &a.dim, &a.page_size, &a.q_stride, &a.k_stride, &a.v_stride})
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

template <class T>
Embed<T> read(Arguments& from, Embed<T>*) {
  Embed<T> a;
  a.table = from.address<const T>();
  a.ids = from.address<const int64_t>();
  a.y = from.address<T>();
  a.rows = from.integer();
  a.width = from.integer();
  return a;
}

template <class T>
Sample<T> read(Arguments& from, Sample<T>*) {
  Sample<T> a;
  a.logits = from.address<const T>();
  a.slots = from.address<const int64_t>();
  a.positions = from.address<const int64_t>();
  a.temperature = from.address<const double>();
  a.min_p = from.address<const double>();
  a.top_p = from.address<const double>();
  a.top_k = from.address<const int64_t>();
  a.seed_keys = from.address<const int64_t>();
  a.tokens = from.address<int64_t>();
  a.rows = from.integer();
  a.width = from.integer();
  a.not_finite = from.integer();
  a.all_masked = from.integer();
  return a;
}

Product read(Arguments& from, Product*) {
  Product a;
  for (const Bf16** field : {&a.x, &a.residual, &a.norm, &a.weight}) *field = from.address<const Bf16>();
  a.y = from.address<Bf16>();
  a.sum = from.address<Bf16>();
  for (int64_t* field : {&a.rows, &a.width, &a.outputs}) *field = from.integer();
  a.is_activated = from.integer();
  a.eps = from.number();
  return a;
}

Batch read(Arguments& from, Batch*) {
  Batch a;
  a.token_ids = from.address<const int32_t>();
  a.num_computed = from.address<const int64_t>();
  a.page_table = from.address<int64_t>();
  for (const int64_t** field : {&a.slots, &a.starts, &a.new_index, &a.new_page}) *field = from.address<const int64_t>();
  a.ahead = from.address<const int64_t>();
  for (int64_t** field : {&a.ids, &a.positions, &a.places, &a.lengths}) *field = from.address<int64_t>();
  for (int64_t* field : {&a.rows, &a.ids_stride, &a.table_stride, &a.page_size, &a.num_ahead}) *field = from.integer();
  return a;
}

Advance read(Arguments& from, Advance*) {
  Advance a;
  a.token_ids = from.address<int32_t>();
  a.num_computed = from.address<int64_t>();
  for (const int64_t** field : {&a.slots, &a.lengths, &a.sampled, &a.tokens}) *field = from.address<const int64_t>();
  for (int64_t* field : {&a.rows, &a.num_sampled, &a.ids_stride}) *field = from.integer();
  return a;
}

Draft read(Arguments& from, Draft*) {
  Draft a;
  a.token_ids = from.address<int32_t>();
  for (const int64_t** field : {&a.num_computed, &a.draft_until, &a.slots}) *field = from.address<const int64_t>();
  a.ahead = from.address<int64_t>();
  for (int64_t* field : {&a.rows, &a.width, &a.max_drafts, &a.ids_stride, &a.longest, &a.shortest}) *field = from.integer();
  return a;
}

Accept read(Arguments& from, Accept*) {
  Accept a;
  a.token_ids = from.address<int32_t>();
  a.num_computed = from.address<int64_t>();
  for (const int64_t** field : {&a.slots, &a.lengths}) *field = from.address<const int64_t>();
  a.tokens = from.address<int64_t>();
  for (int64_t* field : {&a.rows, &a.width, &a.ids_stride, &a.not_taken, &a.not_drafted}) *field = from.integer();
  return a;
}

// While a thread records, the calls that it makes are noted as well as done.
thread_local std::unique_ptr<std::vector<Call>> recorded;

template <class Args, void (*function)(const Args&)>
PyObject* call(Arguments& from) {
  const Args a = read(from, static_cast<Args*>(nullptr));
  if (!from.is_complete()) return nullptr;
  if constexpr (std::is_constructible_v<Call, const Args&>) {
    if (recorded) recorded->push_back(a);
  }
  Py_BEGIN_ALLOW_THREADS;
  function(a);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

template <class Args, void (*function)(const Args&)>
PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Arguments from(args, count);
  return call<Args, function>(from);
}

// The first argument says whether the tensors are bf16 (else fp32); the others are the fields of Args, in their order.
template <template <class> class Args, void (*narrow)(const Args<Bf16>&), void (*wide)(const Args<float>&)>
PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Arguments from(args, count);
  const bool is_bf16 = from.integer();
  return is_bf16 ? call<Args<Bf16>, narrow>(from) : call<Args<float>, wide>(from);
}

constexpr char PROGRAM[] = "nemo_engine._cpu.program";

PyObject* start_recording(PyObject*, PyObject*) {
  recorded = std::make_unique<std::vector<Call>>();
  Py_RETURN_NONE;
}

// What was called since `start_recording`, for `replay`. The memory that it names must live as long.
PyObject* stop_recording(PyObject*, PyObject*) {
  if (!recorded) return PyErr_SetString(PyExc_RuntimeError, "nothing is being recorded"), nullptr;
  return PyCapsule_New(recorded.release(), PROGRAM, [](PyObject* capsule) {
    delete static_cast<std::vector<Call>*>(PyCapsule_GetPointer(capsule, PROGRAM));
  });
}

// replay(rows, program, ...): one after the other
PyObject* replay(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Arguments from(args, std::min<Py_ssize_t>(count, 1));
  const int64_t rows = from.integer();
  if (!from.is_complete()) return nullptr;
  std::vector<const std::vector<Call>*> programs;
  for (Py_ssize_t i = 1; i < count; ++i) {
    programs.push_back(static_cast<const std::vector<Call>*>(PyCapsule_GetPointer(args[i], PROGRAM)));
    if (!programs.back()) return nullptr;
  }
  Py_BEGIN_ALLOW_THREADS;
  nemo::replay(programs, rows);
  Py_END_ALLOW_THREADS;
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

PyObject* set_lanes(PyObject*, PyObject* count) {
  const long wanted = PyLong_AsLong(count);
  if (PyErr_Occurred()) return nullptr;
  if (!nemo::set_lanes(static_cast<int>(wanted))) return PyErr_Format(PyExc_ValueError, "this machine has no vectors of %ld numbers", wanted);
  Py_RETURN_NONE;
}

PyCFunction of_list(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

#define FUNCTION(name, Args) {#name, of_list(&call<Args, name<Bf16>, name<float>>), METH_FASTCALL, nullptr}
#define OF_ONE_KIND(name, Args) {#name, of_list(&call<Args, name>), METH_FASTCALL, nullptr}

PyMethodDef methods[] = {
    FUNCTION(rms_norm, Norm),
    FUNCTION(silu_mul, Activation),
    FUNCTION(rope_and_append_kv, Rope),
    FUNCTION(query_attention, Attention),
    FUNCTION(embed, Embed),
    FUNCTION(sample, Sample),
    OF_ONE_KIND(product, Product),
    OF_ONE_KIND(build_batch, Batch),
    OF_ONE_KIND(advance, Advance),
    OF_ONE_KIND(draft, Draft),
    OF_ONE_KIND(accept, Accept),
    {"start_recording", start_recording, METH_NOARGS, nullptr},
    {"stop_recording", stop_recording, METH_NOARGS, nullptr},
    {"replay", of_list(&replay), METH_FASTCALL, nullptr},
    {"set_lanes", set_lanes, METH_O, nullptr},
    {"set_num_threads", set_num_threads, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&definition); }
