// What the headers of newer compilers ask of the system's libraries and those of manylinux_2_28 do
// not have; see manylinux.cmake. Not used where a compiler is as old.
#include <new>
#include <sstream>

extern "C" {

// glibc 2.32: whether reference counts may go without atomics. They have them.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

// GLIBCXX_3.4.29: std::__throw_bad_array_new_length, what containers of too many elements throw.
[[noreturn]] __attribute__((visibility("hidden"))) void _ZSt28__throw_bad_array_new_lengthv() {
  throw std::bad_array_new_length();
}

}  // extern "C"

// GLIBCXX_3.4.26: earlier ones had these inline.
template std::basic_stringstream<char>::basic_stringstream();
template std::basic_ostringstream<char>::basic_ostringstream();
