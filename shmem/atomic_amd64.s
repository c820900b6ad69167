#include "textflag.h"

// Plain moves have acquire and release ordering on amd64.

// func load8(p unsafe.Pointer) uint8
TEXT ·load8(SB), NOSPLIT, $0-9
	MOVQ p+0(FP), DI
	MOVB (DI), AX
	MOVB AX, ret+8(FP)
	RET

// func load16(p unsafe.Pointer) uint16
TEXT ·load16(SB), NOSPLIT, $0-10
	MOVQ p+0(FP), DI
	MOVW (DI), AX
	MOVW AX, ret+8(FP)
	RET

// func store8(p unsafe.Pointer, v uint8)
TEXT ·store8(SB), NOSPLIT, $0-9
	MOVQ p+0(FP), DI
	MOVB v+8(FP), AX
	MOVB AX, (DI)
	RET

// func store16(p unsafe.Pointer, v uint16)
TEXT ·store16(SB), NOSPLIT, $0-10
	MOVQ p+0(FP), DI
	MOVW v+8(FP), AX
	MOVW AX, (DI)
	RET

// func Pause()
TEXT ·Pause(SB), NOSPLIT, $0-0
	PAUSE
	RET
