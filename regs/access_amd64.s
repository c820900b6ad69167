#include "textflag.h"

// func load32(address uintptr) uint32
TEXT ·load32(SB), NOSPLIT, $0-12
	MOVQ address+0(FP), DI
	MOVL (DI), AX
	MOVL AX, ret+8(FP)
	RET

// func store32(address uintptr, v uint32)
TEXT ·store32(SB), NOSPLIT, $0-12
	MOVQ address+0(FP), DI
	MOVL v+8(FP), AX
	SFENCE
	MOVL AX, (DI)
	RET
