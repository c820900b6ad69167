package vfiouser

// RefuseWithin is Refuse with another time limit.
var RefuseWithin = refuse

// FD is the server's socket.
func (s *Server) FD() int { return s.conn.FD() }
