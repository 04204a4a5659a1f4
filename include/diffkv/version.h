// The library's version. Within one major version: source compatible; see docs/compatibility.md.
#pragma once

#define DIFFKV_VERSION_MAJOR 0
#define DIFFKV_VERSION_MINOR 1
#define DIFFKV_VERSION_PATCH 0
