// Definitions of our own for what new releases of GCC ask of new releases of glibc and libstdc++,
// so that a library which was built on a new Linux loads on an old one. Only binaries that are
// given away have them (ADAMW_XLA_PORTABLE); exports.map keeps them to this library.

#include <pthread.h>

#include <condition_variable>
#include <mutex>
#include <new>
#include <sstream>

// glibc 2.32: std::shared_ptr counts without atomics where this is not 0. XLA has threads.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;

namespace std {

// GLIBCXX_3.4.30; the call that all releases of libstdc++ make for it.
void condition_variable::wait(unique_lock<mutex>& lock) {
  pthread_cond_wait(native_handle(), lock.mutex()->native_handle());
}

// GLIBCXX_3.4.29: std::allocator's refusal of more than the address space.
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

// GLIBCXX_3.4.26: their constructors without arguments, where these are not inlined.
template class basic_stringbuf<char>;
template class basic_stringstream<char>;

}  // namespace std
