// `coopflow_ext._host`: the layer-1 headers on numpy arrays, without torch, so that tests check the
// very functions that the kernels call, element by element.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = COOPFLOW_VERSION;
  info["compiler"] = COOPFLOW_COMPILER;
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "The mathematics of csrc/include/coopflow on numpy arrays (for tests).";
  m.def("build_info", &build_info, "Version and compiler of this module.");
}
