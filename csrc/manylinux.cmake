# Lets a library that was linked on a newer Linux load on manylinux_2_28, the oldest that torch's own
# wheels load on: glibc 2.28 and the libstdc++ of GCC 8. x86-64 only, as `make wheel` is.
#
# A linker takes of each symbol the version that is the default in the first library that has it. So
# before the system's libraries the linker gets some of the same names without any code, in which the
# symbols below have the version that they were born with. At run time the system's own libraries are
# loaded: glibc keeps every version for ever. Where the system is as old, this changes nothing.
#
# What a newer compiler asks for that an old system has in no version is in manylinux.cpp.

# coopflow_old_glibc(<file name> <version> <symbol>… [<version> <symbol>…]…): a target of that name.
function(coopflow_old_glibc library)
  string(REGEX MATCH "^lib(.+)\\.so\\.(.+)$" parts ${library})
  set(name ${CMAKE_MATCH_1})
  set(soversion ${CMAKE_MATCH_2})
  set(code "")
  set(versions "")
  set(end "")
  foreach(word IN LISTS ARGN)
    if(word MATCHES "^GLIBC_")
      string(APPEND versions "${end}${word} {\n")
      set(end "};\n")
    else()
      string(APPEND versions "  ${word};\n")
      string(APPEND code "extern \"C\" void ${word}() {}\n")
    endif()
  endforeach()
  set(stem "${CMAKE_CURRENT_BINARY_DIR}/glibc/${library}")
  file(GENERATE OUTPUT "${stem}.cpp" CONTENT "${code}")
  file(GENERATE OUTPUT "${stem}.map" CONTENT "${versions}${end}")
  add_library(${library} SHARED "${stem}.cpp")
  set_target_properties(
    ${library}
    PROPERTIES OUTPUT_NAME ${name}
               SOVERSION ${soversion}
               LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/glibc"
               CXX_VISIBILITY_PRESET default
               LINK_DEPENDS "${stem}.map")
  target_compile_options(${library} PRIVATE -fno-builtin -fno-sanitize=all -w)
  target_link_options(
    ${library} PRIVATE -nostdlib -fno-sanitize=all -Xlinker "--version-script=${stem}.map")
endfunction()

# The CUDA runtime, which is linked statically, opens the driver and has threads of its own. These
# moved to libc.so.6, at GLIBC_2.34.
coopflow_old_glibc(
  libdl.so.2
  GLIBC_2.2.5 dlclose dlerror dlopen dlsym dlvsym
  GLIBC_2.3.4 dlmopen)
coopflow_old_glibc(
  libpthread.so.0 GLIBC_2.2.5
  pthread_condattr_setpshared pthread_create pthread_detach pthread_join pthread_kill pthread_once
  pthread_getspecific pthread_key_create pthread_key_delete pthread_setspecific
  pthread_mutex_trylock pthread_mutexattr_destroy pthread_mutexattr_init
  pthread_mutexattr_setpshared pthread_mutexattr_settype
  pthread_rwlock_destroy pthread_rwlock_init pthread_rwlock_rdlock pthread_rwlock_timedrdlock
  pthread_rwlock_timedwrlock pthread_rwlock_tryrdlock pthread_rwlock_trywrlock
  pthread_rwlock_unlock pthread_rwlock_wrlock pthread_rwlockattr_destroy pthread_rwlockattr_init
  pthread_rwlockattr_setpshared
  pthread_spin_destroy pthread_spin_init pthread_spin_lock pthread_spin_trylock pthread_spin_unlock
  sem_destroy sem_init sem_post sem_timedwait sem_trywait sem_wait)
coopflow_old_glibc(librt.so.1 GLIBC_2.2.5 shm_open shm_unlink)
# The CPU loops. GLIBC_2.29 leaves out an error handler of System V; the numbers are the same to the
# bit (a NaN may have the other sign).
coopflow_old_glibc(libm.so.6 GLIBC_2.2.5 exp exp2 log pow)
set(COOPFLOW_OLD_GLIBC libdl.so.2 libpthread.so.0 librt.so.1 libm.so.6)
