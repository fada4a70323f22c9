/* What the shared library shows to programs that link to it, in C and C++. */
#ifndef DERAINER_EXPORT_H
#define DERAINER_EXPORT_H

/* DERAINER_API: a function or class that is compiled into the library, which is built with DERAINER_BUILDING defined.
 * DERAINER_TYPE: a class that is all in its header, such as an exception, and has to be the same on both sides. */
#ifdef _WIN32
#ifdef DERAINER_BUILDING
#define DERAINER_API __declspec(dllexport)
#else
#define DERAINER_API __declspec(dllimport)
#endif
#define DERAINER_TYPE
#else
#define DERAINER_API __attribute__((visibility("default")))
#define DERAINER_TYPE DERAINER_API
#endif

#endif
